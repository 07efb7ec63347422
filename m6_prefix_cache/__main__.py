from m0_basics.tools.cli import main

main("m6_prefix_cache")
