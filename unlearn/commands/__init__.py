"""A module a command: `add(commands)` declares its options; what else it needs it imports when it runs."""
