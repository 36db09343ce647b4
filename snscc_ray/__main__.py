from snscc_ray.cli import main

main()
