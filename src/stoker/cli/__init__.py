"""The command line: its commands are in `verbs`, beside it is what they share."""
