"""Results to look at after training: plots and videos."""
