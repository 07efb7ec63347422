from m0_basics.cli import main

main("m1_offline")
