// One decode step of the structured recurrent mixer: one thread an element (d, h, b), in float32.
//
//   row: s' = w * x + d * s,  y = s' + b
//   col: s' = x + d * s,      y = w * s' + b

struct StepPlan {
  long positions;     // L
  long position;      // that of every sequence, unless there is an array of them
  long index_bytes;   // of an integer of that array; 0 without it
  long index_stride;  // strides are in elements; 0 where one position serves all
  long x_b, x_h, x_d;
  long state_b, state_h, state_d;
  long weight_h, weight_l;
  long bias_h, bias_l;
  long decay_h;
  long y_b, y_h, y_d;
  long new_b, new_h, new_d;
};

// rows: which heads are row heads, 32 of them in a long.
template <typename X, typename P, typename S>
KERNEL void recurrent_step(
    device const X* x BUFFER(0), device const S* state BUFFER(1), device const P* weight BUFFER(2),
    device const P* bias BUFFER(3), device const P* decay BUFFER(4), device const void* index BUFFER(5),
    device X* y BUFFER(6), device S* new_state BUFFER(7), constant long* rows BUFFER(8),
    constant StepPlan& plan BUFFER(9), uint3 at POSITION) {
  const long d = at.x, h = at.y, b = at.z;
  long position = plan.position;
  if (plan.index_bytes != 0) position = integer_at(index, plan.index_bytes, b * plan.index_stride);
  float weight_here = NAN, bias_here = NAN;  // where the model has no such position
  if (position >= 0 && position < plan.positions) {
    weight_here = float(weight[h * plan.weight_h + position * plan.weight_l]);
    bias_here = float(bias[h * plan.bias_h + position * plan.bias_l]);
  }
  const bool row = ((rows[h / 32] >> (h % 32)) & 1) != 0;
  const float input = float(x[b * plan.x_b + h * plan.x_h + d * plan.x_d]);
  const float before = float(state[b * plan.state_b + h * plan.state_h + d * plan.state_d]);
  const float after = (row ? weight_here * input : input) + float(decay[h * plan.decay_h]) * before;
  y[b * plan.y_b + h * plan.y_h + d * plan.y_d] = X((row ? after : weight_here * after) + bias_here);
  new_state[b * plan.new_b + h * plan.new_h + d * plan.new_d] = S(after);
}

INSTANCE(recurrent_step_float_float_float, recurrent_step, float, float, float)
INSTANCE(recurrent_step_half_float_float, recurrent_step, half, float, float)
INSTANCE(recurrent_step_half_float_half, recurrent_step, half, float, half)
INSTANCE(recurrent_step_half_half_float, recurrent_step, half, half, float)
INSTANCE(recurrent_step_half_half_half, recurrent_step, half, half, half)
#if HAS_BFLOAT
INSTANCE(recurrent_step_bfloat_float_float, recurrent_step, bfloat, float, float)
INSTANCE(recurrent_step_bfloat_float_bfloat, recurrent_step, bfloat, float, bfloat)
INSTANCE(recurrent_step_bfloat_bfloat_float, recurrent_step, bfloat, bfloat, float)
INSTANCE(recurrent_step_bfloat_bfloat_bfloat, recurrent_step, bfloat, bfloat, bfloat)
#endif
