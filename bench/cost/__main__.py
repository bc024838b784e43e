from bench.cost.page import main

main()
