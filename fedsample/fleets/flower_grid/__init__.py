"""Any Flower app on nodes of ours: a Grid over carriers, a carrier within this process, and what starts an app."""

from fedsample.fleets.flower_grid.answer import answer
from fedsample.fleets.flower_grid.app_folder import AppFolder, imported, read_app
from fedsample.fleets.flower_grid.grid import Carrier, CarrierGrid
from fedsample.fleets.flower_grid.in_process import InProcess
from fedsample.fleets.flower_grid.run import FlowerRun, run_flower

__all__ = [
    "AppFolder",
    "Carrier",
    "CarrierGrid",
    "FlowerRun",
    "InProcess",
    "answer",
    "imported",
    "read_app",
    "run_flower",
]
