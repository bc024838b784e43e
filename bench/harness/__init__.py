"""What every benchmark stands on: cases, shapes, peers, the gate, the clock, memory, charts."""
