"""What each command does: its options, and the calls behind them; `megassm NAME` and tools/ and launch/ start them."""
