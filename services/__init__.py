"""The processes of the system. They never import each other; they meet in `shared.messages`."""
