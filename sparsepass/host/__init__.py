"""What the machine around us gives: devices, versions, variables and files."""
