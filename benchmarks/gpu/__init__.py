"""What a GPU does: step times and peak memory of full-size models (`measure`), and checks for its first minutes (`first`)."""
