from m0_basics.tools.cli import main

main("m2_continuous_batching")
