"""What a run measured: its log, plots and the page that compares runs."""
