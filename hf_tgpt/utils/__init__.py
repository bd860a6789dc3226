"""The ground that everything stands on: files, names, versions. Nothing here imports anything of the package."""
