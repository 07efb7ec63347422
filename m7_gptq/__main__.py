from m0_basics.tools.cli import main

main("m7_gptq")
