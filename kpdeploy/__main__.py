from kpdeploy.cli import main

main()
