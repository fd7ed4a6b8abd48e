"""`ril bench`: ours, our plain pass and TRL's GRPOTrainer side by side, each in a process of its own."""
