from m0_basics.cli import main

main("m4_flash_attn")
