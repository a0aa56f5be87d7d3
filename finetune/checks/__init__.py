"""Everything about a recipe that can be wrong, found before a weight is read: its settings, the model, the output."""
