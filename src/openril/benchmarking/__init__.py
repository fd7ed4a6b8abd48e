"""`ril bench`: ours, our plain pass and TRL's GRPOTrainer compared, each in a separate process."""
