"""The commands, one short file each: arguments that belong together are checked where their command lives."""
