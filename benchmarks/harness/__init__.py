"""What all benchmarks share: cases, providers, accuracy, clocks, memory, results."""
