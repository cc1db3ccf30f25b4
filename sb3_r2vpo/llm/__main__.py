from sb3_r2vpo.llm.cli import main

main()
