"""What a video file holds and how its frames become arrays: opening, times, colours, orientation, and damage."""
