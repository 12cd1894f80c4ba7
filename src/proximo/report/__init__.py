"""What a user looks at after training: plots and videos."""
