// y[t] = g[t] * y[t-1] + x[t]: one thread a channel (d, b), serial over time, in float32.
//
// Neighbouring threads hold neighbouring channels, so that at each step a group reads and writes what lies together.

struct ScanPlan {
  long steps;          // T
  long reverse;        // t runs from the end to 0
  long has_tokens;     // else the cumulative product
  long has_state;      // else it begins with 0, or with 1 without tokens
  long length_bytes;   // of an integer of lengths; 0 without lengths
  long length_stride;  // strides are in elements; 0 along an axis of extent 1
  long gate_b, gate_t, gate_d;
  long token_b, token_t, token_d;
  long state_b, state_d;
  long y_b, y_t, y_d;
  long last_b, last_d;
};

template <typename X, typename G, typename S>
KERNEL void scan(
    device const G* gates BUFFER(0), device const X* tokens BUFFER(1), device const S* state BUFFER(2),
    device const void* lengths BUFFER(3), device X* y BUFFER(4), device S* last BUFFER(5),
    constant ScanPlan& plan BUFFER(6), uint3 at POSITION) {
  const long d = at.x, b = at.y;
  long length = plan.steps;
  if (plan.length_bytes != 0) {
    const long given = integer_at(lengths, plan.length_bytes, b * plan.length_stride);
    length = given < 0 ? 0 : given > plan.steps ? plan.steps : given;
  }
  device const G* gate = gates + (b * plan.gate_b + d * plan.gate_d);
  device const X* token = tokens + (b * plan.token_b + d * plan.token_d);
  device X* out = y + (b * plan.y_b + d * plan.y_d);

  float s = plan.has_tokens != 0 ? 0.0f : 1.0f;
  if (plan.has_state != 0) s = float(state[b * plan.state_b + d * plan.state_d]);
  float g = float(gate[0]);
  for (long k = 0; k < length; ++k) {
    const long t = plan.reverse != 0 ? length - 1 - k : k;
    if (plan.gate_t != 0) g = float(gate[t * plan.gate_t]);  // a constant one is read once
    s = g * s;
    if (plan.has_tokens != 0) s += float(token[t * plan.token_t]);
    out[t * plan.y_t] = X(s);
  }
  for (long t = length; t < plan.steps; ++t) out[t * plan.y_t] = X(0.0f);
  last[b * plan.last_b + d * plan.last_d] = S(s);
}

INSTANCE(scan_float_float_float, scan, float, float, float)
INSTANCE(scan_half_float_float, scan, half, float, float)
INSTANCE(scan_half_float_half, scan, half, float, half)
INSTANCE(scan_half_half_float, scan, half, half, float)
INSTANCE(scan_half_half_half, scan, half, half, half)
#if HAS_BFLOAT
INSTANCE(scan_bfloat_float_float, scan, bfloat, float, float)
INSTANCE(scan_bfloat_float_bfloat, scan, bfloat, float, bfloat)
INSTANCE(scan_bfloat_bfloat_float, scan, bfloat, bfloat, float)
INSTANCE(scan_bfloat_bfloat_bfloat, scan, bfloat, bfloat, bfloat)
#endif
