from m0_basics.cli import main

main("m0_basics")
