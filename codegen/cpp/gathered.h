// Attention along lists of single keys, or of blocks so small that a vector of keys would be nearly empty: the keys of one query, whatever
// blocks they lie in, are gathered side by side, for all heads of a group that share the list.

// Keys that are gathered at once; queries of one piece of work; keys of a block, at most.
constexpr i64 GATHERED = 128, GATHERING = 16, GATHERED_BLOCK = WIDTH / 4;

struct Gathering : Lines {
    i64 heads;
    real *logits, *turned, *rows, *tile;  // (heads, GATHERED); keys, turned; rows of keys or values; logits of one block
    i64 q_idx[MOST_LANES], h[MOST_LANES], bits[MOST_LANES] = {}, first[MOST_INTERVALS * MOST_LANES], last[MOST_INTERVALS * MOST_LANES];
    i64 keys[GATHERED];
    Lanes lanes;

    static bool fits(const Selected *s) { return s->block <= GATHERED_BLOCK && !s->weights; }
    static i64 size(const Call *c, i64 heads) {
        i64 broad_d = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
        return heads * (broad_d + broad_v + GATHERED + 2) + GATHERED * (broad_d + most(broad_d, broad_v)) + broad_v +
               GATHERED_BLOCK * whole_vectors(heads) + 16 * WIDTH;
    }

    Gathering(const Call *c, const Selected *s, i64 heads, real *at) : Lines{c, s, whole_vectors(c->head_dim_v)}, heads(heads) {
        i64 broad_d = whole_vectors(c->head_dim);
        auto take = [&](i64 n) { real *here = at; at += whole_vectors(n); return here; };
        q = take(heads * c->head_dim), values = take(heads * broad_v), highest = take(heads), total = take(heads), near = take(broad_v);
        logits = take(heads * GATHERED), turned = take(GATHERED * broad_d), rows = take(GATHERED * most(broad_d, broad_v));
        tile = take(GATHERED_BLOCK * whole_vectors(heads));
    }

    // The query of a row. Whether all that was written is finite.
    bool run(i64 b, i64 group, i64 groups, i64 row) {
        i64 kv_head = group * c->kv_heads / groups;
        i64 place = ((b * s->list_batch + group * s->list_heads / groups) * c->rows + row) * s->slots;
        lanes = {whole_vectors(heads), heads, b, 0, c->q_offset + c->rows, c->keys, q_idx, h, bits};
        for (i64 i = 0; i < lanes.count; i++) q_idx[i] = c->q_offset + row, h[i] = group * heads + least(i, heads - 1);
        for (i64 i = 0; i < heads; i++) begin(b, h[i], row, i);
        if (c->ends) c->ends(c, &lanes, first, last);
        Head k(c->k, c->kind, c->head_dim, b, kv_head, 0, 1), v(c->v, c->kind, c->head_dim_v, b, kv_head, 0, 1);
        i64 at_once = GATHERED / s->block;
        for (i64 slot = 0; slot < s->slots && s->indices[place + slot] >= 0; slot += at_once)
            meet(k, v, place + slot, least(at_once, s->slots - slot));
        bool finite = true;
        for (i64 i = 0; i < heads; i++) finite &= finish(b, row, h[i], i);
        return finite;
    }

    // The keys of up to `slots` blocks of a list.
    void meet(const Head &k, const Head &v, i64 place, i64 slots) {
        i64 n = 0;
        for (i64 slot = 0; slot < slots && s->indices[place + slot] >= 0; slot++)
            for (i64 key = s->indices[place + slot] * s->block, end = least(key + s->block, c->keys); key < end; key++) keys[n++] = key;
        for (i64 i = 0; i < n; i++)  // while products with keys are made, values come nearer
            for (i64 byte = 0; byte < c->head_dim_v * element_bytes(c->kind); byte += 64) __builtin_prefetch(v.at_row(keys[i]) + byte, 0, 2);
        i64 broad_d = whole_vectors(c->head_dim), whole = whole_vectors(n);
        const real *of[GATHERED];
        for (i64 j = 0; j < n; j++) of[j] = k.padded_row(keys[j], rows + j * broad_d);
        turn_rows(c->head_dim, [&](i64 i) { return of[i]; }, n, whole, BROAD, turned);
        product_of<false>(heads, whole, c->head_dim, Even<const real>{q, c->head_dim}, 1, turned, BROAD, BROAD * c->head_dim,
                          Even<real>{logits, GATHERED});
        modify(place, n);
        for (i64 i = 0; i < heads; i++) {
            for (i64 j = n; j < whole; j++) logits[i * GATHERED + j] = LOWEST;
            join(logits + i * GATHERED, whole, i);
        }
        for (i64 j = 0; j < n; j++) of[j] = v.padded_row(keys[j], rows + j * broad_v);
        product_from<true>(heads, broad_v, n, Even<const real>{logits, GATHERED}, 1, [&](i64 d) { return From<const real>{of, d}; },
                           Even<real>{values, broad_v});
    }

    // Masks and scores, block by block, by the pattern's own functions, which want lines side by side; and intervals.
    void modify(i64 place, i64 n) {
        i64 side = lanes.count;
        for (i64 from = 0, slot = 0, count; (c->score || c->mask) && from < n; from += count, slot++) {
            count = least(s->block, c->keys - keys[from]);
            for (i64 i = 0; s->members && i < side; i++) bits[i] = s->members[place + slot];
            for (i64 j = 0; j < count; j++)
                for (i64 i = 0; i < side; i++) tile[j * side + i] = logits[least(i, heads - 1) * GATHERED + from + j];
            if (c->score) c->score(c, &lanes, keys[from], count, tile);
            if (c->mask) c->mask(c, &lanes, keys[from], count, tile);
            for (i64 j = 0; j < count; j++)
                for (i64 i = 0; i < heads; i++) logits[i * GATHERED + from + j] = tile[j * side + i];
        }
        for (i64 i = 0; c->ends && i < heads; i++) {
            bool all_seen = false;  // keys ascend
            for (i64 m = 0; m < c->intervals; m++)
                all_seen |= first[m * MOST_LANES + i] <= keys[0] && keys[n - 1] <= last[m * MOST_LANES + i];
            for (i64 j = 0; !all_seen && j < n; j++) hide_line(c, first, last, i, keys[j], 1, logits + i * GATHERED + j);
        }
    }
};
