from m0_basics.cli import main

main("m3_paged_kv")
