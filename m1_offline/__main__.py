from m0_basics.tools.cli import main

main("m1_offline")
