"""What every room may use: checks of arguments, files, plug-ins, names of the release before."""
