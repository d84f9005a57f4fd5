from lissom.cli import main

main()
