"""Any Flower app on nodes of ours: a Grid over carriers, a carrier within this process, and the runner of an app."""

from fedsample.fleets.flower_grid.app_folder import AppFolder, imported, imported_client, imported_server, read_app
from fedsample.fleets.flower_grid.grid import Carrier, CarrierGrid
from fedsample.fleets.flower_grid.in_process import InProcess, node_id
from fedsample.fleets.flower_grid.run import FlowerRun, drive, run_flower
from fedsample.fleets.flower_grid.run_client_app import answer

__all__ = [
    "AppFolder",
    "Carrier",
    "CarrierGrid",
    "FlowerRun",
    "InProcess",
    "answer",
    "drive",
    "imported",
    "imported_client",
    "imported_server",
    "node_id",
    "read_app",
    "run_flower",
]
