"""The paper's figures for the methods here: Duan et al., IEEE TIP 2025, Table IV."""

from __future__ import annotations

# (ACC, NMI, ARI) as printed; None for a dash in the table.
Printed = tuple[float | None, float | None, float | None]

SOURCE = "Duan et al., IEEE TIP 2025, Table IV"
# The table's datasets, by recipe name; its CIFAR-100 uses the 20 superclasses.
DATA_SETS = ("cifar10", "cifar20", "stl10", "imagenet10", "imagenet_dogs")
# As printed: NMI, ACC and ARI for each dataset in turn. `snscc` is the row "Boost Stage".
_ROWS = """
kmeans  .087 .229 .049   .084 .130 .028   .125 .192 .061   .119 .241 .057   .055 .105 .020
sc      .103 .247 .085   .090 .136 .022   .098 .159 .048   .151 .274 .076   .038 .111 .013
ac      .105 .228 .065   .098 .138 .034   .239 .332 .140   .138 .242 .067   .037 .139 .021
nmf     .081 .190 .034   .079 .118 .026   .096 .180 .046   .132 .230 .065   .044 .118 .016
ae      .239 .314 .169   .100 .165 .048   .250 .303 .161   .210 .317 .152   .104 .185 .073
dae     .251 .297 .163   .111 .151 .046   .224 .302 .152   .206 .304 .138   .104 .190 .078
vae     .245 .291 .167   .108 .152 .040   .200 .282 .146   .193 .334 .168   .107 .179 .079
dec     .257 .301 .161   .136 .185 .050   .276 .359 .186   .282 .381 .203   .122 .195 .079
iic        - .617    -      - .257    -      - .610    -      -    -    -      -    -    -
pica    .591 .696 .512   .310 .337 .171   .611 .713 .531   .802 .870 .761   .352 .352 .201
cc      .705 .790 .637   .431 .429 .266   .746 .850 .726   .859 .893 .822   .445 .429 .274
pretext .598 .659 .509   .402 .395 .239   .604 .658 .506      -    -    -      -    -    -
scan    .715 .816 .665   .449 .440 .283   .673 .792 .618      -    -    -      -    -    -
snscc   .795 .886 .777   .502 .508 .347   .612 .736 .559   .855 .931 .856   .445 .463 .308
"""
TABLE_IV = {method: tuple(cells) for method, *cells in map(str.split, _ROWS.split("\n")[1:-1])}


def printed(method: str, recipe: str) -> Printed | None:
    """Return the table's figures of a method on the dataset of a recipe, or of its variants."""
    for place, name in enumerate(DATA_SETS):
        if recipe.startswith(name) and method in TABLE_IV:
            nmi, acc, ari = (
                None if cell == "-" else float(cell)
                for cell in TABLE_IV[method][3 * place : 3 * place + 3]
            )
            return acc, nmi, ari
    return None
