"""Cases, providers, accuracy check, clocks, memory and results of all benchmarks."""
