"""What every experiment shares: configuration, data, model, the one train loop, metrics, plots."""
