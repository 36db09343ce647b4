from snscc_ray.cli import console

console()
