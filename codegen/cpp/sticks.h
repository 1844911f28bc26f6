// Breaking a stick: of what the keys after it have left, a key takes the sigmoid of its logit. Blocks of keys are visited from the last to
// the first. What is left is carried as a logarithm in units of log2: 1 less the weights given away would lose all digits.

// log2(1 + t) for 0 <= t <= 1, with the digits of t where it is small.
static inline Vector log_one_more(Vector t) {
#ifdef DOUBLE
    Vector u = t / (2.0 + t), w = u * u;  // the area tangent, whose series has odd powers alone
    Vector p = 0.1200972426250948869 + w * 0.245895302481250894;
    p = 0.1747128036831406594 + w * p;
    p = 0.1918838365890802428 + w * p;
    p = 0.2219819177490447902 + w * p;
    p = 0.2623070733378305453 + w * p;
    p = 0.3205989247881797162 + w * p;
    p = 0.4121985827364002006 + w * p;
    p = 0.5770780163582651325 + w * p;
    p = 0.9617966939259681451 + w * p;
    p = 2.885390081777926818 + w * p;
    return u * p;
#else
    Vector p = 0.028193907166f + t * -0.0045820817101f;
    p = -0.081329931667f + t * p;
    p = 0.15211233763f + t * p;
    p = -0.22029472964f + t * p;
    p = 0.28368108259f + t * p;
    p = -0.35997573045f + t * p;
    p = 0.48084608051f + t * p;
    p = -0.72134597168f + t * p;
    p = 1.4426950332f + t * p;
    return t * p;
#endif
}

// Of one key: what it does to the stick. `take`, `pass`: logarithms of the shares that it takes and leaves, sigmoid(z) and sigmoid(-z). What
// is masked, a logit of -inf, takes nothing and leaves all.
struct Broken {
    Vector power, take, pass;
    Integers above;  // whether the logit is positive

    explicit Broken(Vector z) {
        Vector none = {};
        above = z > none;
        power = power_of_two(above ? -z : z);
        Vector more = log_one_more(power);
        take = (above ? none : z) - more;
        pass = (above ? -z : none) - more;
    }
};

// Logits of a block of keys -> weights, from its last key on; what is left becomes less. Within a block it is added up from 0, so that
// its small steps do not drown in what came before.
template <int VECTORS>
static inline void break_lanes(real *tile, i64 keys, i64 row, real factor, real *left) {
    Vector before[VECTORS], later[VECTORS];
    for (int v = 0; v < VECTORS; v++) before[v] = at(left + v * WIDTH), later[v] = Vector{};
    for (i64 j = keys - 1; j >= 0; j--)
        for (int v = 0; v < VECTORS; v++) {
            real *pair = tile + j * row + v * WIDTH;
            Broken key(at(pair) * factor);
            put(pair, power_of_two(key.take + (later[v] + before[v])));
            later[v] += key.pass;
        }
    for (int v = 0; v < VECTORS; v++) put(left + v * WIDTH, before[v] + later[v]);
}

static void break_sticks(const Strip &strip, real *tile, i64 keys, real factor, real *left) {
    i64 row = strip.lanes.count, i = 0;
    for (; i + 2 * WIDTH <= row; i += 2 * WIDTH) break_lanes<2>(tile + i, keys, row, factor, left + i);
    if (i < row) break_lanes<1>(tile + i, keys, row, factor, left + i);
}

// What is left of the stick of each lane after a block of keys, and no weights.
static void pass_sticks(const Strip &strip, const real *tile, i64 keys, real factor, real *left) {
    i64 row = strip.lanes.count;
    for (i64 i = 0; i < row; i += WIDTH) {
        Vector later = {};
        for (i64 j = keys - 1; j >= 0; j--) later += Broken(at(tile + j * row + i) * factor).pass;
        put(left + i, at(left + i) + later);
    }
}

// Whether what any key could still take is 0 in the type of the computation, for each lane.
static bool nothing_left(const Strip &strip, const real *left) {
    constexpr real least_power = sizeof(real) == 8 ? -1076 : -151;
    for (i64 i = 0; i < strip.used; i++)
        if (!(left[i] < least_power)) return false;
    return true;
}

// The blocks of keys that a strip reads, from the last on, and what is left to each: the backward pass goes through them the other way.
struct Walk {
    struct Block {
        i64 key, keys, full;
    };
    Block *blocks;
    real *left;
    i64 count = 0;

    static i64 size(const Call *c, const Strip &strip) {
        return most_blocks(c, strip) * (MOST_LANES + (i64)(sizeof(Block) / sizeof(real)));
    }
    Walk(const Call *c, const Strip &strip, real *room) : blocks((Block *)room) {
        left = room + most_blocks(c, strip) * (i64)(sizeof(Block) / sizeof(real));
    }
    void add(const Strip &strip, i64 key, i64 keys, bool full, const real *now) {
        blocks[count] = {key, keys, full};
        __builtin_memcpy(left + count++ * MOST_LANES, now, strip.lanes.count * sizeof(real));
    }
};

// Logits of a block -> weights; gradients of weights -> those of logits, which are g A (1 - s), less s times the sum of g A over all earlier
// keys. `left`: what later blocks left; `earlier`: the sums of earlier blocks, to which those of this one are added. `share`, `given`: room.
static void differentiate_sticks(
    const Strip &strip, i64 keys, real factor, const real *left, real *earlier, real *tile, real *change, real *share, real *given) {
    i64 row = strip.lanes.count;
    for (i64 i = 0; i < row; i += WIDTH) {
        Vector before = at(left + i), later = {}, sum = {}, none = {};
        for (i64 j = keys - 1; j >= 0; j--) {
            i64 pair = j * row + i;
            Broken key(at(tile + pair) * factor);
            Vector weight = power_of_two(key.take + (later + before));
            later += key.pass;
            Vector large = (real)1 / ((real)1 + key.power), small = key.power * large;  // the larger of both shares, and the smaller
            // What is masked has no part in it, whatever its product with the gradient is.
            Vector gain = weight == none ? none : weight * at(change + pair);
            put(tile + pair, weight);
            put(given + pair, gain);
            put(share + pair, key.above ? large : small);
            put(change + pair, gain * (key.above ? small : large));
        }
        before = at(earlier + i);
        for (i64 j = 0; j < keys; j++) {
            i64 pair = j * row + i;
            put(change + pair, at(change + pair) - at(share + pair) * (before + sum));
            sum += at(given + pair);
        }
        put(earlier + i, before + sum);
    }
}
