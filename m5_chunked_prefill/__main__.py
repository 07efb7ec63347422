from m0_basics.tools.cli import main

main("m5_chunked_prefill")
