"""The gateway: OpenAI's HTTP interface in front of the engines, and `/admin` for those who move traffic."""
