from m0_basics.tools.cli import main

main("m3_paged_kv")
