"""What the benchmarks measure; the commands are tools/bench_*.py."""
