"""What people run: the command line, checks, benchmarks, tuning, the demonstration, offline compilation."""
