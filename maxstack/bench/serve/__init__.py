"""Load on a server that speaks OpenAI's protocol, and what it makes of it (`maxstack bench serve`)."""
