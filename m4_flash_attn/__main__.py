from m0_basics.tools.cli import main

main("m4_flash_attn")
