from m0_basics.cli import main

main("m2_continuous_batching")
