"""What a run did: monitors while it trains, log parsers, and a report to compare runs."""
