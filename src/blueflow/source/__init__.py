"""Where events come from: the relay's websocket, and recordings."""
