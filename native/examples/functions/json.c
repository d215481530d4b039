/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transform JSON (RFC 8259): the payload's value in its shortest form, with sorted keys, so that what is equal has
 * equal bytes.  With a path as argument, what lies there: `.users[].name` is the names of all users, as an array.
 *
 * Numbers stay as they are written.  Of a key that comes twice the last value counts.
 */
#include "function.h"

#define DEPTH_MAX 256

enum kind { WORD, STRING, ARRAY, OBJECT }; /* a word: a number, true, false or null */

struct value {
    enum kind kind;
    uint8_t *text; /* of a word or, decoded to UTF-8, of a string */
    size_t length; /* of the text, or of the items */
    size_t room;
    struct value *items;
    struct value *keys; /* of an object: strings, one for each item */
};

static const uint8_t *start, *next, *end; /* of the payload */

static _Noreturn void wrong(const char *what)
{
    fprintf(stderr, "%s at byte %zu\n", what, (size_t)(next - start));
    exit(1);
}

static int peek(void)
{
    while (next < end && (*next == ' ' || *next == '\t' || *next == '\n' || *next == '\r'))
        next++;
    return next < end ? *next : -1;
}

static void expect(char mark)
{
    if (peek() != mark)
        wrong("something else was expected");
    next++;
}

/* ---- words and strings ---- */

static int digits(void)
{
    const uint8_t *first = next;

    while (next < end && *next >= '0' && *next <= '9')
        next++;
    return next > first;
}

static void parse_number(struct value *value)
{
    const uint8_t *first = next;

    next += *next == '-';
    if (next < end && *next == '0')
        next++;
    else if (!digits())
        wrong("a number without digits");
    if (next < end && *next == '.') {
        next++;
        if (!digits())
            wrong("a number without digits");
    }
    if (next < end && (*next == 'e' || *next == 'E')) {
        next++;
        next += next < end && (*next == '+' || *next == '-');
        if (!digits())
            wrong("a number without digits");
    }
    value->text = (uint8_t *)first;
    value->length = (size_t)(next - first);
}

static void parse_word(struct value *value)
{
    static const char *const words[] = {"true", "false", "null"};

    for (int i = 0; i < 3; i++) {
        size_t length = strlen(words[i]);

        if ((size_t)(end - next) >= length && memcmp(next, words[i], length) == 0) {
            value->text = (uint8_t *)words[i];
            value->length = length;
            next += length;
            return;
        }
    }
    wrong("no value begins like this");
}

static unsigned hex4(void)
{
    unsigned code = 0;

    if (end - next < 4)
        wrong("an escape is cut off");
    for (int i = 0; i < 4; i++, next++) {
        int letter = *next | 0x20;

        if (*next >= '0' && *next <= '9')
            code = code << 4 | (unsigned)(*next - '0');
        else if (letter >= 'a' && letter <= 'f')
            code = code << 4 | (unsigned)(letter - 'a' + 10);
        else
            wrong("an escape is not hexadecimal");
    }
    return code;
}

static void put_utf8(struct bytes *text, unsigned code)
{
    if (code < 0x80) {
        bytes_put(text, (uint8_t)code);
        return;
    }
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;

    bytes_put(text, (uint8_t)(0xff80 >> more | code >> 6 * more));
    while (more--)
        bytes_put(text, (uint8_t)(0x80 | (code >> 6 * more & 63)));
}

static void parse_escape(struct bytes *text)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    int mark = next < end ? *next++ : 0;
    const char *found = mark ? strchr(from, mark) : NULL;

    if (found) {
        bytes_put(text, (uint8_t)to[found - from]);
        return;
    }
    if (mark != 'u')
        wrong("there is no such escape");
    unsigned code = hex4();

    if (code >> 10 == 0x36) { /* the first half of a pair (UTF-16) */
        if (end - next < 2 || next[0] != '\\' || next[1] != 'u')
            wrong("half a character");
        next += 2;
        unsigned low = hex4();

        if (low >> 10 != 0x37)
            wrong("half a character");
        code = 0x10000 + ((code & 0x3ff) << 10) + (low & 0x3ff);
    } else if (code >> 10 == 0x37) {
        wrong("half a character");
    }
    put_utf8(text, code);
}

/* One character that is not ASCII, whole and in its shortest form (Unicode, table 3-7). */
static void parse_utf8(struct bytes *text)
{
    unsigned first = *next, more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1, code = first & (0x3f >> more);

    if (first < 0xc2 || first > 0xf4 || (size_t)(end - next) <= more)
        wrong("the payload is not UTF-8");
    for (unsigned i = 1; i <= more; i++) {
        if (next[i] >> 6 != 2)
            wrong("the payload is not UTF-8");
        code = code << 6 | (next[i] & 63);
    }
    if ((more == 2 && code < 0x800) || (more == 3 && code < 0x10000) || code > 0x10ffff || code >> 11 == 0x1b)
        wrong("the payload is not UTF-8");
    bytes_add(text, next, more + 1);
    next += more + 1;
}

static void parse_string(struct value *value)
{
    struct bytes text = {0};

    expect('"');
    for (;;) {
        if (next == end)
            wrong("a string does not end");
        if (*next == '"')
            break;
        if (*next < 0x20)
            wrong("a control character in a string");
        if (*next >= 0x80) {
            parse_utf8(&text);
        } else if (*next == '\\') {
            next++;
            parse_escape(&text);
        } else {
            bytes_put(&text, *next++);
        }
    }
    next++;
    value->kind = STRING;
    value->text = text.data;
    value->length = text.length;
}

/* ---- arrays and objects ---- */

static int compare(const struct value *one, const struct value *two)
{
    size_t both = one->length < two->length ? one->length : two->length;
    int order = both ? memcmp(one->text, two->text, both) : 0;

    return order ? order : (one->length > two->length) - (one->length < two->length);
}

static struct value *add_item(struct value *value)
{
    if (value->length == value->room) {
        value->room = value->room ? 2 * value->room : 8;
        value->items = realloc(value->items, value->room * sizeof(*value->items));
        value->keys = value->kind == OBJECT ? realloc(value->keys, value->room * sizeof(*value->keys)) : NULL;
        if (!value->items || (value->kind == OBJECT && !value->keys))
            fail(3, "not enough memory: raise the function's limit");
    }
    value->items[value->length] = (struct value){0};
    return &value->items[value->length++];
}

/* Sort by key; of equal keys the last stays, so a merge sort, which keeps their order. */
static void sort(struct value *value)
{
    size_t count = value->length, kept = 0;
    size_t *order = allocate(2 * count * sizeof(*order)), *other = order + count;

    for (size_t i = 0; i < count; i++)
        order[i] = i;
    for (size_t width = 1; width < count; width *= 2) {
        for (size_t from = 0; from < count; from += 2 * width) {
            size_t middle = from + width < count ? from + width : count;
            size_t to = middle + width < count ? middle + width : count;
            size_t left = from, right = middle;

            for (size_t i = from; i < to; i++)
                other[i] = left < middle &&
                                   (right == to || compare(&value->keys[order[left]], &value->keys[order[right]]) <= 0)
                               ? order[left++]
                               : order[right++];
        }
        size_t *swap = order;

        order = other;
        other = swap;
    }
    struct value *keys = allocate(count * sizeof(*keys)), *items = allocate(count * sizeof(*items));

    for (size_t i = 0; i < count; i++) {
        if (i + 1 < count && compare(&value->keys[order[i]], &value->keys[order[i + 1]]) == 0)
            continue;
        keys[kept] = value->keys[order[i]];
        items[kept++] = value->items[order[i]];
    }
    value->keys = keys;
    value->items = items;
    value->length = kept;
}

static void parse(struct value *value, int depth)
{
    int mark = peek();

    if (depth > DEPTH_MAX)
        wrong("nested too deep");
    if (mark == '"') {
        parse_string(value);
    } else if (mark == '[' || mark == '{') {
        char last = mark == '[' ? ']' : '}';

        value->kind = mark == '[' ? ARRAY : OBJECT;
        next++;
        if (peek() == last) {
            next++;
            return;
        }
        for (;;) {
            struct value *item = add_item(value);

            if (value->kind == OBJECT) {
                struct value *key = &value->keys[value->length - 1];

                *key = (struct value){0};
                parse_string(key);
                expect(':');
            }
            parse(item, depth + 1);
            if (peek() != ',')
                break;
            next++;
        }
        expect(last);
        if (value->kind == OBJECT)
            sort(value);
    } else if (mark == '-' || (mark >= '0' && mark <= '9')) {
        parse_number(value);
    } else {
        parse_word(value);
    }
}

/* ---- the way back ---- */

static void put_string(struct bytes *out, const struct value *value)
{
    bytes_put(out, '"');
    for (size_t i = 0; i < value->length; i++) {
        static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
        uint8_t byte = value->text[i];
        const char *found = byte ? strchr(from, byte) : NULL;

        if (found) {
            bytes_put(out, '\\');
            bytes_put(out, (uint8_t)to[found - from]);
        } else if (byte < 0x20) {
            char escape[8];

            bytes_add(out, escape, (size_t)snprintf(escape, sizeof(escape), "\\u%04x", byte));
        } else {
            bytes_put(out, byte);
        }
    }
    bytes_put(out, '"');
}

static void put_value(struct bytes *out, const struct value *value)
{
    if (value->kind == WORD) {
        bytes_add(out, value->text, value->length);
        return;
    }
    if (value->kind == STRING) {
        put_string(out, value);
        return;
    }
    bytes_put(out, value->kind == ARRAY ? '[' : '{');
    for (size_t i = 0; i < value->length; i++) {
        if (i)
            bytes_put(out, ',');
        if (value->kind == OBJECT) {
            put_string(out, &value->keys[i]);
            bytes_put(out, ':');
        }
        put_value(out, &value->items[i]);
    }
    bytes_put(out, value->kind == ARRAY ? ']' : '}');
}

/* What lies at `path`: `.key`, `[number]`, and `[]` for every item, whose results are an array. */
static struct value look_up(const struct value *value, const char *path)
{
    if (!*path)
        return *value;
    if (*path == '.') {
        size_t length = strcspn(path + 1, ".[");
        struct value key = {.kind = STRING, .text = (uint8_t *)path + 1, .length = length};

        if (value->kind == OBJECT)
            for (size_t i = 0; i < value->length; i++)
                if (compare(&value->keys[i], &key) == 0)
                    return look_up(&value->items[i], path + 1 + length);
        fprintf(stderr, "there is no key %.*s\n", (int)length, path + 1);
        exit(1);
    }
    if (*path != '[' || value->kind != ARRAY)
        fail(*path == '[' ? 1 : 2, *path == '[' ? "there is no array" : "a path is .KEY, [NUMBER] and []");
    if (path[1] == ']') {
        struct value all = {.kind = ARRAY};

        for (size_t i = 0; i < value->length; i++)
            *add_item(&all) = look_up(&value->items[i], path + 2);
        return all;
    }
    char *after;
    unsigned long number = strtoul(path + 1, &after, 10);

    if (after == path + 1 || *after != ']')
        fail(2, "a path is .KEY, [NUMBER] and []");
    if (number >= value->length)
        fail(1, "the array is shorter");
    return look_up(&value->items[number], after + 1);
}

int main(int argc, char **argv)
{
    struct bytes input = read_input(), out = {0};
    struct value value = {0};

    next = start = input.data;
    end = input.data + input.length;
    parse(&value, 0);
    if (peek() != -1)
        wrong("something follows the value");
    if (argc > 1)
        value = look_up(&value, argv[1]);
    put_value(&out, &value);
    write_output(out.data, out.length);
    return 0;
}
