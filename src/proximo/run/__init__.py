"""Records of a run: run folder, metrics, checkpoints, trackers, debug bundles and progress on the terminal."""
