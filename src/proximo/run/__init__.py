"""What a run leaves on disk and on the terminal: folder, metrics, checkpoints, trackers, debug bundles."""
