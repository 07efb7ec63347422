"""What a step must cost, and what it does cost: calculators, roofline, counters and micro-benchmarks."""
