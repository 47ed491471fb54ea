module bench/ambassador

go 1.26.0

require bench/scatter v0.0.0

replace bench/scatter => ../scatter
